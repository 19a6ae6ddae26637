"""Expert compute: "these tokens through these experts" in several forms, one per platform and purpose."""
