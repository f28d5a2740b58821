"""The three roles of the one model: what each is asked, and how its verdict is read. Text in, text out.

`actor` answers, `judge` scores a response from 0 to 5, `meta_judge` names the better of two judgments. A fourth, `response_judge`,
names the better of two responses; it serves to assess models, and no stage of the loop asks it.
The wording lives in `templates/*.txt`; `templates` loads and fills it; `verdict` and `winner` hold what the parsers
share. Nothing here knows about tensors, files of a run or token ids.
"""
