"""The report's pages: what a run says of itself in words, Markdown and HTML, and the writing of the folder."""
