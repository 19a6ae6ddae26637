"""Parts that the measuring commands share: timing, divergence, prompt sets, ledger, plots. Private."""
