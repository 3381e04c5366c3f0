"""Experiments as data: claims, the runs that test them, and the verdicts.

A TOML file says what is claimed, what is run and how it is judged (`settings`). A run leaves one
JSON line beside the file (`lines`). Tables, pages and verdicts come from the lines alone (`judge`,
`page`).
"""
