"""What a model tells those who ask: one file a way to tell less."""
