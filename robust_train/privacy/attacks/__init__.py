"""How members are told from non-members: one file a method."""
