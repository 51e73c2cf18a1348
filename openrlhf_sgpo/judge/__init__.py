"""The client of language models behind OpenAI-compatible servers, which judge answers, and the replies that it stores."""
