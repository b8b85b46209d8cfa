"""A local page to try a model on: a picture and texts -> scores, heat maps, segmentation, regions; search in a folder.

answers.py     what the page computes, without gradio: a path and typed lines -> numbers and pictures
page.py        the page, of gradio's components, and its server
__main__.py    python -m flair_jax.demo
"""
