"""What a run looks like: the page that shows every token, the doctor, the plots of its curves.

Leave it closed to understand an algorithm: it reads what a run has written, and writes pictures.
Open it to change a figure.
"""
