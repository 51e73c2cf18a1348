"""Asking a language model behind an OpenAI-compatible server: the client, and the answers that are kept."""
