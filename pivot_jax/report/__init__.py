"""The report of a run, which reads files only, in reading order.

`compare` has the numbers; `page` lays them out, with `tables` and `charts`;
`markup` has the templates, in which every string is escaped.
"""
