"""Quality of decoding: divergence from the exact target, accuracy of answers, tasks of lm-evaluation-harness."""
