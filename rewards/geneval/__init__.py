"""GenEval's protocol: the requirements of a prompt, and whether detected objects fulfil them."""
