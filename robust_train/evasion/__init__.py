"""Evasion: threat models, attacks, training objectives and honest evaluation. Plain torch, no Lightning."""
