"""What visual tokens are aligned to: frozen features, computed once and stored, or at every step."""
