"""Models at work: one-off answers, a conversation, an evaluation."""
