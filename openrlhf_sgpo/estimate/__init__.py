"""``openrlhf-sgpo estimate``: memory, time and disk that a recipe takes, and what makes it fit, before anything is rented."""
