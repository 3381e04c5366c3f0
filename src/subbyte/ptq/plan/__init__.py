"""Which layer gets how many levels and which rank."""
