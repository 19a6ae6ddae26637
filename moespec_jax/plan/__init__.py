"""What a model needs on TPUs that are not at hand: programs compiled for them ahead of time, and what they say."""
