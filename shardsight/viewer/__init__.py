"""A viewer of rows for the browser: plain HTML, CSS and JavaScript, which request nothing from the network.

page: rows as one self-contained file. job: a job's results as such a page. The service's page uses the same scripts of
this folder: picture.js (a picture with its detections drawn), player.js (a video, likewise) and viewer.js (filters,
cards, a row as text). videos, mp4: a job's videos as small ones that a browser plays.
"""
