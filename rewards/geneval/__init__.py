"""GenEval's protocol: what a prompt asks for, and whether detected objects fulfil it."""
