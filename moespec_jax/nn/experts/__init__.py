"""Expert compute (outputs of the routed experts, weighted and summed), one form for each platform and purpose."""
