"""``openrlhf-sgpo chat``: a conversation with the policy of a run, beside the initial one, and with SLHF's follower."""
