"""Classes that travel with width-edited students, one self-contained file a family.

A file here is copied as it stands into the student's folder, so it imports torch and diffusers only.
"""
