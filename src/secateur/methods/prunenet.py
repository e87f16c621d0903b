from secateur.methods.selection import Selection


class PruneNet(Selection):
    name = "prunenet"
