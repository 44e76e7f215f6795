"""What a person looks at before a run: rows as the model sees them, cards, overlaps."""
