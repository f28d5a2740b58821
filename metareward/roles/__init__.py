"""The three roles of the one model: what each is asked, and how its verdict is read. Text in, text out.

`actor` answers, `judge` scores a response from 0 to 5, `meta_judge` names the better of two judgments.
The wording lives in `templates/*.txt`; `templates` loads and fills it; `verdict` holds what the two parsers
share. Nothing here knows about tensors, files of a run or token ids.
"""
