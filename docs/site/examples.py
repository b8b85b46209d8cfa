"""An extension of griffe: a section `Example:` with doctests is shown as code."""

import griffe


class Examples(griffe.Extension):
    """Names the section as griffe's parser of Google's style knows it."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
