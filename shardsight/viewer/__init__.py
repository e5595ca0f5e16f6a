"""A viewer of rows for the browser: plain HTML, CSS and JavaScript, which request nothing from the network.

page: rows as one self-contained file. job: a job's results as such a page. The service's page uses the same scripts of
this folder: picture.js (a picture with its detections drawn) and viewer.js (filters, cards, a row as text).
"""
