"""Parts shared by the commands: flags, prompts, traces, summaries, one-line errors. Private."""
