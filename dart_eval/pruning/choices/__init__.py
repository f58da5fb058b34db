"""What a token computes of a mask."""
