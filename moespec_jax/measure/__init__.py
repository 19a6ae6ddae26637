"""Parts that the measuring commands share: timing, divergence, prompt sets, the ledger of finished tasks, plots. Private: see `moespec_jax`."""
