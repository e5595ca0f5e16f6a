"""Rows to look at in a browser: plain HTML, CSS and JavaScript, without a network.

page: rows as one file that opens from a disk. job: a job's results as such a page. The service's page loads the same
scripts from this folder: picture.js (a picture with what was found in it) and viewer.js (filters, cards, a row in
words).
"""
