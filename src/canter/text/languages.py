"""Languages as people write them (``en``, ``EN``, ``English``, ``en-US``, ``eng``), and the one code each stands for.

Codes are those of ISO 639-1 where a language has one, else of ISO 639-3, as in Whisper's and FLEURS' lists. A model's
own code for a language may be another (``jw`` and ``jv``, ``zh`` and ``cmn``): `resolve` finds it.
"""

# pyright: strict

import functools
import re
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from canter.errors import ConfigError

# Codes of one language, the one that is used first, and its English names.
_TABLE = """
aa aar: Afar
ab abk: Abkhazian, Abkhaz
ae ave: Avestan
af afr: Afrikaans
ak aka: Akan
am amh: Amharic
an arg: Aragonese
ar ara arb: Arabic, Standard Arabic, Modern Standard Arabic
as asm: Assamese
av ava: Avaric, Avar
ay aym ayr: Aymara
az aze azj: Azerbaijani, Azeri
ba bak: Bashkir
be bel: Belarusian, Belarussian, Byelorussian
bg bul: Bulgarian
bi bis: Bislama
bm bam: Bambara
bn ben: Bengali, Bangla
bo bod tib: Tibetan
br bre: Breton
bs bos: Bosnian
ca cat: Catalan, Valencian
ce che: Chechen
ch cha: Chamorro
co cos: Corsican
cr cre: Cree
cs ces cze: Czech
cu chu: Church Slavic, Church Slavonic
cv chv: Chuvash
cy cym wel: Welsh
da dan: Danish
de deu ger: German
dv div: Divehi, Dhivehi, Maldivian
dz dzo: Dzongkha
ee ewe: Ewe
el ell gre: Greek, Modern Greek
en eng: English
eo epo: Esperanto
es spa: Spanish, Castilian
et est ekk: Estonian
eu eus baq: Basque
fa fas per pes: Persian, Farsi
ff ful: Fulah, Fula, Fulani
fi fin: Finnish
fj fij: Fijian
fo fao: Faroese
fr fra fre: French
fy fry: Western Frisian, Frisian
ga gle: Irish, Gaeilge, Irish Gaelic
gd gla: Scottish Gaelic
gl glg: Galician
gn grn gug: Guarani
gu guj: Gujarati
gv glv: Manx
ha hau: Hausa
he heb iw: Hebrew
hi hin: Hindi
ho hmo: Hiri Motu
hr hrv: Croatian
ht hat: Haitian, Haitian Creole
hu hun: Hungarian
hy hye arm: Armenian
hz her: Herero
ia ina: Interlingua
id ind in: Indonesian, Bahasa Indonesia
ie ile: Interlingue
ig ibo: Igbo
ii iii: Sichuan Yi
ik ipk: Inupiaq
io ido: Ido
is isl ice: Icelandic
it ita: Italian
iu iku: Inuktitut
ja jpn: Japanese
jv jav jw: Javanese
ka kat geo: Georgian
kg kon: Kongo
ki kik: Kikuyu, Gikuyu
kj kua: Kuanyama
kk kaz: Kazakh
kl kal: Kalaallisut, Greenlandic
km khm: Khmer, Cambodian
kn kan: Kannada
ko kor: Korean
kr kau: Kanuri
ks kas: Kashmiri
ku kur kmr: Kurdish
kv kom kpv: Komi
kw cor: Cornish
ky kir: Kirghiz, Kyrgyz
la lat: Latin
lb ltz: Luxembourgish, Letzeburgesch
lg lug: Ganda, Luganda
li lim: Limburgan, Limburgish
ln lin: Lingala
lo lao: Lao
lt lit: Lithuanian
lu lub: Luba-Katanga
lv lav lvs: Latvian
mg mlg plt: Malagasy
mh mah: Marshallese
mi mri mao: Maori
mk mkd mac: Macedonian
ml mal: Malayalam
mn mon khk: Mongolian
mr mar: Marathi
ms msa may zsm: Malay
mt mlt: Maltese
my mya bur: Burmese, Myanmar
na nau: Nauru
nd nde: North Ndebele
ne nep npi: Nepali
ng ndo: Ndonga
nl nld dut: Dutch, Flemish
nn nno: Norwegian Nynorsk, Nynorsk
no nor nb nob: Norwegian, Bokmal, Bokmål, Norwegian Bokmal, Norwegian Bokmål
nr nbl: South Ndebele
nv nav: Navajo, Navaho
ny nya: Chichewa, Nyanja, Chewa
oc oci: Occitan
oj oji: Ojibwa
om orm gaz: Oromo
or ori ory: Oriya, Odia
os oss: Ossetian, Ossetic
pa pan: Panjabi, Punjabi
pi pli: Pali
pl pol: Polish
ps pus pbt: Pushto, Pashto
pt por: Portuguese
qu que quy: Quechua
rm roh: Romansh, Romansch
rn run: Rundi, Kirundi
ro ron rum mo mol: Romanian, Moldavian, Moldovan
ru rus: Russian
rw kin: Kinyarwanda
sa san: Sanskrit
sc srd: Sardinian
sd snd: Sindhi
se sme: Northern Sami
sg sag: Sango
sh hbs: Serbo-Croatian
si sin: Sinhala, Sinhalese
sk slk slo: Slovak
sl slv: Slovenian
sm smo: Samoan
sn sna: Shona
so som: Somali
sq sqi alb als: Albanian
sr srp: Serbian
ss ssw: Swati, Siswati
st sot: Southern Sotho, Sesotho
su sun: Sundanese
sv swe: Swedish
sw swa swh: Swahili, Kiswahili
ta tam: Tamil
te tel: Telugu
tg tgk: Tajik
th tha: Thai
ti tir: Tigrinya
tk tuk: Turkmen
tl tgl fil: Tagalog, Filipino, Pilipino
tn tsn: Tswana, Setswana
to ton: Tonga, Tongan
tr tur: Turkish
ts tso: Tsonga
tt tat: Tatar
tw twi: Twi
ty tah: Tahitian
ug uig: Uighur, Uyghur
uk ukr: Ukrainian
ur urd: Urdu
uz uzb uzn: Uzbek
ve ven: Venda
vi vie: Vietnamese
vo vol: Volapük
wa wln: Walloon
wo wol: Wolof
xh xho: Xhosa
yi yid ji ydd: Yiddish
yo yor: Yoruba
za zha: Zhuang
zh zho chi cmn: Chinese, Mandarin, Mandarin Chinese
zu zul: Zulu
ace: Acehnese
ary: Moroccan Arabic
arz: Egyptian Arabic
ast: Asturian
ban: Balinese
bar: Bavarian
bho: Bhojpuri
ceb: Cebuano
ckb: Central Kurdish, Sorani
dsb: Lower Sorbian
fur: Friulian
gsw: Swiss German
hak: Hakka
haw: Hawaiian
hsb: Upper Sorbian
ilo: Ilocano, Iloko
kab: Kabyle
kam: Kamba
kea: Kabuverdianu, Cape Verdean Creole
lij: Ligurian
lmo: Lombard
ltg: Latgalian
luo: Luo, Dholuo
mai: Maithili
mdf: Moksha
mhr: Eastern Mari, Meadow Mari
min: Minangkabau
mni: Manipuri
mrj: Western Mari, Hill Mari
myv: Erzya
nan: Min Nan, Hokkien, Taiwanese
nds: Low German
nso: Northern Sotho, Pedi, Sepedi
prs: Dari
sah: Yakut, Sakha
sat: Santali
scn: Sicilian
sco: Scots
szl: Silesian
tig: Tigre
tok: Toki Pona
tyv: Tuvan
udm: Udmurt
umb: Umbundu
vec: Venetian
war: Waray
wuu: Wu Chinese, Shanghainese
yue: Cantonese, Yue Chinese, Yue
zgh: Standard Moroccan Tamazight
"""

NOT_SAID = frozenset(("", "auto", "und", "unknown", "none", "null"))
SHOWN = 12  # languages that an error message lists
_CODE = re.compile(r"[a-z]{2,3}")
_MARKS = re.compile(r"<\||\|>|\(.*?\)|（.*?）")
_SEPARATORS = re.compile(r"[\s_,-]+")


def is_said(written: str | None) -> TypeGuard[str]:
    """Return whether the value names a language: not None, empty, or ``auto``."""
    return written is not None and written.strip().lower() not in NOT_SAID


def canonical(written: str) -> str | None:
    """Return the code of the language that ``written`` names, as a code or in English, or None where it names none.

    A region or script after a code (``pt-BR``, ``cmn_hans_cn``) and Whisper's brackets (``<|en|>``) are passed over.
    A well-formed code that is in no list stands for itself.
    """
    text = _SEPARATORS.sub(" ", _MARKS.sub(" ", written)).strip().casefold()
    codes = _codes()
    if text in codes:
        return codes[text]
    first = text.partition(" ")[0]
    return codes.get(first, first if _CODE.fullmatch(first) else None)


def english_name(code: str) -> str:
    """Return the English name of a language's code, or the code where it is in no list."""
    return _names().get(code, code)


def same(one: str, other: str) -> bool:
    """Return whether two values name the same language."""
    found = canonical(one)
    return one == other or (found is not None and found == canonical(other))


def find(written: str, known: Iterable[str]) -> str | None:
    """Return the one of the codes ``known`` that stands for the language written, or None.

    The value itself goes first, apart from case and separators, so that ``pt-PT`` and ``pt-BR`` may both be known;
    then the shortest code of the same language.
    """
    names = list(known)
    if written in names:
        return written
    plain = _plain(written)
    exact = [name for name in names if _plain(name) == plain]
    code = canonical(written)
    alike = [name for name in names if code is not None and canonical(name) == code]
    return min(exact or alike, key=len, default=None)


def resolve(written: str, known: Sequence[str]) -> str:
    """Return the code of `find`. Raises ConfigError naming the value and the known languages where there is none."""
    found = find(written, known)
    if found is not None:
        return found
    code = canonical(written)
    name = english_name(code) if code else ""
    what = f"{written!r} ({name})" if code and name.casefold() not in (code, written.casefold()) else f"{written!r}"
    if code is None:
        raise ConfigError(f"{what} is not the name or code of a language; {listed(known)}")
    raise ConfigError(f"{what} is not a language of this model; {listed(known)}")


def listed(known: Sequence[str]) -> str:
    """Return what an error message says of the languages known: all of a few, of many the first."""
    return f"it knows {shortened(known)}" if known else "it has no languages to choose from"


def shortened(names: Sequence[str]) -> str:
    """Return the names as a list in words; of many the first, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names if more <= 1 else [*names[:SHOWN], f"and {more} more"])


def _plain(text: str) -> str:
    return _SEPARATORS.sub("-", _MARKS.sub("", text).strip()).casefold()


@functools.cache
def _codes() -> dict[str, str]:
    """Map every code and name, in lower case, to the language's code."""
    found: dict[str, str] = {}
    for line in _TABLE.strip().splitlines():
        codes, _, names = line.partition(": ")
        first, *_ = codes.split()
        for one in (*codes.split(), *names.split(", ")):
            found.setdefault(_SEPARATORS.sub(" ", one).casefold(), first)
    return found


@functools.cache
def _names() -> dict[str, str]:
    rows = (line.partition(": ") for line in _TABLE.strip().splitlines())
    return {codes.split()[0]: names.split(", ")[0] for codes, _, names in rows}
