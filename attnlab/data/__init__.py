"""What text tasks are made of: corpora, their prepared form on disk, tokenizers and packings.

The walk of a byte: an archive or a file (`corpora`, `fetch`) becomes documents, the documents
become a sealed directory of ArrayRecord shards (`builder`, `prepared`), a split of that directory
is opened as a `TextSplit` (`textset`), a tokenizer turns it into token ids (`tokenizers`,
`tokens`), and a packing (`packed`, `stream`) says which tokens stand in which row of which step.
"""
