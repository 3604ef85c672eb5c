"""Texts and conversations on which tokenizers and templates disagree, for comparing what two programs make of them.

A text with characters that no keyboard has is here because somebody's document had them.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import cycle

from bitnet_train.data.conversation import Message

_MESSAGES = (  # letters of several scripts, composed and not; digits, code, spaces, signs
    *("Hi", "What does the rule unused-import check?", "12 + 3 = 15, 1234567890", "I'll say it's DON'T"),
    *("def f(x):\n    return x\n\n\nprint(f(1))", "a  b   c\td", "Größe, naïve, e\u0301 and \u00e9", "日本の首都は?"),
    *("Москва — столица", "😀👍🏽 ok", "x<y && y>z || a!=b", '{"key": [1, 2.5, null]}'),
)
# A text in each line, with JSON's escapes. SPECIAL stands for the names of the tokenizer's special tokens in turn.
_TEXTS = r"""
## digits
0
12
1234
12345
12345678901234567890
12 + 3
12+3=15
3.14159
1,234,567.89
2024-01-31T23:59:59Z
0x1F 0b101
1e-9
v1.2.3
1st 2nd 3rd
a1b22c333
\u0020 42 \u0020
+1 (555) 010-9999
\uff11\uff12\uff13
\u0663\u0664\u0665
\u2167 \u00bd \u00b2 \u2460
x\u00b2+y\u00b3
## spaces and ends of lines
\u0020
\u0020\u0020
a b
a\u0020
\u0020 a  b   c    d
\t
\ta\tb
\u0020\t a
a\t\tb
\n
\n\n\n\n
a\nb
a\r\nb
a\r\rb
a \n b
a  \n\n  b
\n a
\u0020\n
a\n \n\n b
a\u00a0b
a\u2009b
a\u3000b
a\u2028b\u2029c
a\u0085b
a\u000bb\u000cc
a\u200bb
a\u202fb\u205fc
\u0020               x
if x:\n    return\n\n\n    y
a\u00a0\u00a0b \u00a0 c
\u2003\u2003x
## contractions
I'm
I'M
don't
DON'T
'tis
it's's
it\u2019s
WE'LL we'll
you've YOU'VE
o'clock
's
\u0020're
'T'S
rock 'n' roll
I'd've
## accents, composed and decomposed; cases
café
cafe\u0301
Ångström \u212b
A\u030angstro\u0308m
\ufb01 fi \ufb03
\u0301a
Việt Nam
Vie\u0323\u0302t Nam
한국어
\u1112\u1161\u11ab\u1100\u116e\u11a8
z\u0335\u0322a\u0321\u030cl\u0334g\u0327o\u0328
\u01c4 \u01c5 \u01c6
\u0130stanbul \u0131
naïve
Größe STRASSE ẞ
\u0958 क\u093c
e\u0301é e\u0300è
## scripts
日本の首都は?
カタカナと漢字
你好\uff0c世界。
中文abc中文
𠀀一𪛖
Москва \u2014 столица
ПРИВЕТ мир Мир
Έλληνες Σσς
\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645
\u0628\u0650\u0633\u0652\u0645\u0650
\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd
नमस\u094dत\u0947 द\u0941न\u093fय\u093e
สว\u0e31สด\u0e35ชาวโลก
வணக\u0bcdகம\u0bcd
ব\u09be\u0982ল\u09be
ក\u17d2ម\u17c2រ
မ\u103cန\u103aမ\u102c
አማርኛ
Հայերեն
ქართული ᲐᲑ
བ\u0f7cད
\u13a0\u13a1\u13a2 \uab70
𐐀𐐨
## emoji
😀
👍🏽 ok
👨\u200d👩\u200d👧
🇩🇪🇫🇷
1\ufe0f\u20e3
❤\ufe0f❤
🏴\udb40\udc67\udb40\udc62\udb40\udc7f
a😀b 😀😀
☺☃☂
:-) \u00af\\_(ツ)_/\u00af
## control, format and private characters
a\u0001b
\u0002\u0003
a\u0007\u0008b
\u001b[31mred\u001b[0m
a\u007fb
a\u0080b\u009f
\ufeffa
a\ufeffb
�
a\u00adb
a\u2060b
\u202eabc\u202c
\u200e\u200f
\ue000\uf8ff
\ufffe\uffff
\udbff\udfff
## signs and code
!
?!...
(a) [b] {c}
\u201cquoted\u201d \u2018it\u2019
a\u2014b\u2013c
$100 €5 £7
50%
a/b//c
#tag @name
x<y && y>z || a!=b
->=>::==
__init__ _a_ a_b
====\n****
∑∫≤ →
°C
https://example.org/a?b=c&d=%20#e
me@example.org
C:\\dir\\x.txt ~/y
`code` **bold** _it_
\\frac{a}{b}
{\"key\": [1, 2.5, null]}
def f(x):\n\treturn x\n\n\nprint(f(1))
<p class='x'>&amp;</p>
SELECT * FROM t;--
camelCaseXMLHttp
ABCdefGHI
aaaaaaaaaaaaaaaaaaaaaaaa
Zm9vYmFy+/==
«gut»
、。\uff01
a...\n\n...b
## names of special tokens of well-known families
<|begin_of_text|>
<|eot_id|>x
a<|end_of_text|>
<|endoftext|>
<|im_start|>user\nHi<|im_end|>\n
<s>
</s>
<s> a </s>
[INST] a [/INST]
<unk>
<pad>
<0x0A>
▁a▁b
Ġa
<|
|>
## around a special token of the tokenizer
SPECIAL
SPECIALSPECIAL
aSPECIALb
a SPECIAL b
\u0020SPECIAL
SPECIAL\u0020
SPECIAL\n
\nSPECIAL\n\n
SPECIAL's
12SPECIAL34
<SPECIAL>
SPECIAL\u0301
日SPECIAL本
\u0020 SPECIAL \u0020
SPECIAL\tSPECIAL
xSPECIAL😀
itSPECIAL's
SPECIAL1SPECIAL2
_SPECIAL_
ASPECIALaSPECIALA
"""


def awkward_texts(special: Sequence[str]) -> list[str]:
    """200 texts, given the names of the tokenizer's special tokens."""
    names = cycle(special or [""])
    lines = [line for line in _TEXTS.splitlines() if line and not line.startswith("## ")]
    texts: list[str] = [json.loads(f'"{line}"') for line in lines]
    return [text.replace("SPECIAL", next(names)) if "SPECIAL" in text else text for text in texts]


def conversations() -> Iterator[list[Message]]:
    """Conversations that end with a user's message."""
    system = Message(role="system", content="Be brief. Größe!")
    answer = Message(role="assistant", content="Yes, 1.")
    for text in _MESSAGES:
        user = Message(role="user", content=text)
        yield from ([user], [system, user], [user, answer, user])
