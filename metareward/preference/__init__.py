"""From scores and verdicts to preference pairs: pure functions on numbers (arXiv 2407.19594, section 2).

Actor pairs: `length_control`. Judge pairs, in the order in which they are made: `variance`, `comparisons`,
`battle`, `elo`, `judgment_pair`. Over the pairs and verdicts of a whole iteration: `caps`, `bias`.
Nothing here reads a file or draws a random number of its own.
"""
