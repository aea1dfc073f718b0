"""How the collection was made: each module draws or reads one kind of picture out of the packages that carry it.

Run once by hand, with the packages unpacked side by side in one folder; the results are in the tree.

    npm pack flag-icons@7.5.0 world-atlas@2.0.2                        # unpack into DIR/flag-icons, DIR/world-atlas
    apt-get download gcompris-qt-data=3.1-2 gnome-backgrounds=43.1-1   # dpkg -x into DIR/NAME
    pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1    # unzip into DIR/NAME
    apt-get install librsvg2-bin                                       # rsvg-convert draws the flags
    python -m corpus.pictures.build DIR

Flags and maps are described from `countries.tsv` and from what is drawn, photographs by hand in `photos.tsv`.
"""
