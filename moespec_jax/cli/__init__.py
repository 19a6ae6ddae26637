"""Parts that the command lines share: flags, prompts, tables, traces, errors as one line. Private."""
