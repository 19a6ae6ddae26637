"""Parts shared by the measuring commands: timing, divergence, prompt sets, ledger, plots. Private."""
