"""Images, data sets, patches and what is drawn on them."""
