"""One line in another project's trainer; each file is imported only when it is used."""
