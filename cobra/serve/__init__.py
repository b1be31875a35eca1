"""Serving: many conversations at once, over HTTP.

prompt.py      a conversation as segments that can be read and recognised one by one
slots.py       the states of the conversations that are being answered, side by side
prefix_cache.py    states behind what was read before
engine.py      reads and decodes for all of them in turn
schemas.py app.py    OpenAI's protocol; limits
"""
