"""Who is preferred."""
