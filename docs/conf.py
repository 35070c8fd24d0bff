"""Sphinx: `pip install -e '.[docs]' && sphinx-build docs docs/_build`."""

project = "attnlab"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "attnlab"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"


def setup(app):
    """Docstrings are written for a terminal: there |x| is a magnitude, not a substitution."""

    def escape(app, what, name, obj, options, lines):
        lines[:] = [line.replace("|", r"\|") for line in lines]

    app.connect("autodoc-process-docstring", escape)
