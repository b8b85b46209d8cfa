"""Public releases as training shards: `python -m data.prepare RELEASE --help`; data/README.md says what and why.

releases  what each release is: how its captions and images are read, and what its records hold
rows      caption files as rows of (join key, captions)
store     rows on disk, found again by their join key in little memory
inputs    images in tars or in a folder
pictures  images checked, and made smaller
shards    writing tars and ArrayRecord
stages    index the captions, match the images, write the shards
runner    a stage on Apache Beam
report    what was read, matched, written and skipped
files     files that appear whole or not at all
"""
