"""What a method learns of a text before it is used."""
