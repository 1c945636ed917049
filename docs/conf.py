"""Sphinx builds build/docs from README.md, the pages beside this file and the docstrings of the installed package."""

import importlib.metadata

project = "isqrt_cov"
author = "the authors of isqrt_cov"
release = importlib.metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
smartquotes = False  # strings in docstrings are code
html_theme = "furo"
html_title = f"isqrt_cov {release}"

nitpicky = True
nitpick_ignore = [("py:class", name) for name in ("Tensor", "Module", "nn.Module")]  # torch's pages are not fetched
nitpick_ignore_regex = [("py:.*", r"torch\..*"), ("py:.*", r"collections\.abc\..*"), ("py:class", r"(os\.)?PathLike.*")]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
