"""Words that the tokeniser of captions must know by heart: abbreviations that keep their full stop, and file endings.

Each table is a regular expression's alternatives, matched without regard to case except for letters in `(?-i:...)`:
there the word is common English too, so only its capitalised form is an abbreviation.
"""


def _alternatives(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


# A full stop after one of these belongs to the word even where a letter follows at once ("Inc.and").
PLACE_TIME_COMPANY = _alternatives(
    r"""
    jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri
    ala ariz (?-i:A)z (?-i:A)rk calif colo conn ct dak (?-i:D)el fla ga (?-i:I)ll ind kans? ky (?-i:L)a (?-i:M)ass
    md mich minn (?-i:M)iss mo mont neb nev okla (?-i:O)re (?-i:P)a penn tenn (?-i:T)ex va vt (?-i:W)ash wisc? wyo
    inc cos? corp pp?t(?-i:[ye])s? ltd plc rt bancorp bhd assn univ intl sys bldg bros jr sr esq ed\.d ph\.d
    blvd rd sq tel est ext etc al seq
    """
)

TITLE_AND_NAME = _alternatives(
    r"""
    mr mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt ste? ave pres
    lieut hon brig co?mdr pfc spc supts? det mt ft adj adv asst assoc ens insp mlle mme msgr sfc
    invt elec natl m(?-i:[ft])g dept wm jos cie cf treas ph vs alex
    """
)

# Abbreviations only where a number follows ("fig. 5", but "a fig.").
BEFORE_NUMBER = _alternatives("ca figs? prop nos? art bldg pp op")

# Capitalised words that start a sentence: a lone letter or initials before one of them end the sentence before it.
SENTENCE_OPENERS = _alternatives(
    r"""
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr\. Ms\.
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You
    """
)

FILE_ENDINGS = _alternatives(
    """
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
    """
)
