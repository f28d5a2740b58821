"""One decoder for the Llama family: the same weights serve training (packed sequences) and sampling (paged
cache).
"""
