"""Word problem templates of one to four computations, as chains of parts (notation: see problem_chains)."""

from __future__ import annotations

from tiny_target.corpus.problem_chains import chains
from tiny_target.corpus.problem_chains import part as p
from tiny_target.corpus.word_problems import Template
from tiny_target.corpus.word_problems import template as t

_THINGS = chains("things", {
    "has": p("{N} has {a} {x}.", "{N} starts with {a} {x}.", a=(5, 60)),
    "boxes": p("{N} has {a} {box} with {b} {x} each.", "{N} fills {a} {box} with {b} {x} each.",
               steps="There are [c = a * b] {x}.", a=(2, 9), b=(2, 12)),
    "rows": p("{N} lays {a} rows of {b} {x}.", "{N} puts {x} into {a} rows of {b} each.",
              steps="There are [c = a * b] {x}.", a=(2, 9), b=(2, 12)),
    "daily": p("{N} finds {a} {x} a day for {b} days.", "For {b} days {N} collects {a} {x} a day.",
               steps="{N} has [c = a * b] {x}.", a=(2, 12), b=(2, 9)),
    "bought": p("{N} has {a} {x} and buys {b} more.", "{N} had {a} {x} and then bought {b} more.",
                steps="{N} has [c = a + b] {x}.", a=(3, 50), b=(2, 40)),
    "found": p("{N} finds {a} {x} on Monday and {b} on Tuesday.", "On one day {N} finds {a} {x}, on the next day {b}.",
               steps="{N} has [c = a + b] {x}.", a=(3, 40), b=(2, 40)),
    "shared": p("{p} {x} are shared equally among {a} friends. {N} is one of them.",
                "{N} is one of {a} friends who share {p} {x} equally.",
                steps="Each friend gets [c = p / a] {x}.", let={"p": "a * b"}, a=(2, 9), b=(3, 20)),
    "gave": p("{N} has {a} {x} and gives {b} of them to {M}.", "{N} had {a} {x} and gave {b} to {M}.",
              steps="{N} has [c = a - b] {x} left.", a=(12, 99), b=(2, 60)),
    "halved": p("{N} has {p} {x} and gives half of them to {M}.", "{N} gives half of {p} {x} to {M} and keeps the others.",
                steps="{N} has [c = p / 2] {x} left.", let={"p": "2 * a"}, a=(3, 60)),
    "times": p("{M} has {a} {x}. {N} has {b} times as many.", "{N} has {b} times as many {x} as {M}, who has {a}.",
               steps="{N} has [c = b * a] {x}.", a=(3, 20), b=(2, 6)),
    "more": p("{M} has {a} {x}. {N} has {b} more.", "{N} has {b} more {x} than {M}, who has {a}.",
              steps="{N} has [c = a + b] {x}.", a=(3, 50), b=(2, 30)),
    "fewer": p("{M} has {a} {x}. {N} has {b} fewer.", "{N} has {b} fewer {x} than {M}, who has {a}.",
               steps="{N} has [c = a - b] {x}.", a=(10, 90), b=(2, 40)),
}, {
    "gain": p("Then {N} finds {k} more {x}. | How many {x} does {N} have now?",
              "Later {N} gets {k} more {x}. | How many {x} does {N} have in all?",
              steps="{N} has [v = u + k] {x}.", k=(2, 40)),
    "lose": p("Then {N} sells {k} {x}. | How many {x} does {N} have left?",
              "Later {N} loses {k} of the {x}. | How many {x} does {N} still have?",
              steps="{N} has [v = u - k] {x} left.", k=(2, 40)),
    "double": p("Then {N} gets as many again. | How many {x} does {N} have now?",
                "Later {N} doubles the number of {x}. | How many {x} does {N} have in all?",
                steps="{N} has [v = 2 * u] {x}."),
    "halve": p("Then {N} sells half of the {x}. | How many {x} does {N} have left?",
               "Later {N} loses half of the {x}. | How many {x} does {N} still have?",
               steps="{N} has [v = u / 2] {x} left."),
    "share": p("{N} shares the {x} equally among {k} friends. | How many {x} does each friend get?",
               "{N} gives all the {x} in equal parts to {k} friends. | How many {x} does each of the friends get?",
               steps="Each friend gets [v = u / k] {x}.", k=(2, 6)),
    "pack": p("{N} packs the {x} into {box} of {k}. | How many {box} does {N} fill?",
              "{N} puts all the {x} into {box} of {k} each. | How many {box} does {N} need?",
              steps="{N} fills [v = u / k] {box}.", k=(2, 6)),
    "price": p("{N} sells all of the {x} at ${k} each. | How many dollars does {N} get?",
               "{N} gets ${k} for each of the {x}. | How many dollars does {N} get in all?",
               steps="{N} gets [v = u * k] dollars.", k=(2, 6)),
    "goal": p("{N} wants to have {k} {x}. | How many more {x} does {N} need?",
              "For a party {N} needs {k} {x}. | How many {x} are missing?",
              steps="{N} needs [v = k - u] more {x}.", k=(20, 150)),
    "other_more": p("{M} has {k} more {x} than {N}. | How many {x} does {M} have?",
                    "{M} owns {k} {x} more than {N}. | How many {x} does {M} own?",
                    steps="{M} has [v = u + k] {x}.", k=(2, 40)),
    "other_fewer": p("{M} has {k} fewer {x} than {N}. | How many {x} does {M} have?",
                     "{M} owns {k} {x} fewer than {N}. | How many {x} does {M} own?",
                     steps="{M} has [v = u - k] {x}.", k=(2, 40)),
    "other_times": p("{M} has {k} times as many {x} as {N}. | How many {x} does {M} have?",
                     "{M} owns {k} times as many {x} as {N}. | How many {x} does {M} own?",
                     steps="{M} has [v = k * u] {x}.", k=(2, 5)),
    "together": p("{M} has {k} {x}. | How many {x} do they have together?",
                  "{M} brings {k} {x}. | How many {x} do {N} and {M} have in all?",
                  steps="Together they have [v = u + k] {x}.", k=(2, 60)),
    "gap": p("{M} has {k} {x}. | How many more {x} does {N} have than {M}?",
             "{M} has only {k} {x}. | How many more {x} does {N} have?",
             steps="{N} has [v = u - k] more {x}.", k=(2, 60)),
    "more_total": p("{M} has {k} more {x} than {N}. | How many {x} do they have together?",
                    "{M} owns {k} {x} more than {N}. | How many {x} do {N} and {M} have in all?",
                    steps="{M} has [v = u + k] {x}. Together they have [w = u + v] {x}.", k=(2, 30)),
    "fewer_total": p("{M} has {k} fewer {x} than {N}. | How many {x} do they have together?",
                     "{M} owns {k} {x} fewer than {N}. | How many {x} do {N} and {M} have in all?",
                     steps="{M} has [v = u - k] {x}. Together they have [w = u + v] {x}.", k=(2, 30)),
    "times_total": p("{M} has {k} times as many {x} as {N}. | How many {x} do they have together?",
                     "{M} owns {k} times as many {x} as {N}. | How many {x} do {N} and {M} have in all?",
                     steps="{M} has [v = k * u] {x}. Together they have [w = u + v] {x}.", k=(2, 5)),
}, """
has     goal pack price other_fewer together lose+share gain+share lose+gain double+lose
boxes   gain lose double share price other_times gap more_total gain+lose lose+share
rows    gain lose halve pack goal other_fewer together fewer_total gain+share
daily   gain lose share pack price other_more together gap times_total lose+gain
bought  gain lose double share price other_more other_fewer gap lose+share
found   lose halve share pack goal other_times together gap fewer_total
shared  gain lose price goal other_fewer other_times more_total gain+lose
gave    gain double halve share price goal
halved  gain lose pack price goal
times   gain lose halve share goal lose+share
more    gain lose double pack price lose+gain
fewer   gain halve share pack goal gain+pack
""")  # fmt: skip

_PLACES = chains("place", {
    "shelves": p("The {place} has {a} shelves with {b} {x} each.", "There are {a} shelves of {b} {x} in the {place}.",
                 steps="There are [c = a * b] {x}.", a=(2, 9), b=(2, 15)),
    "more": p("The {place} has {a} {x} and gets {b} more.", "There are {a} {x} in the {place}, and {b} more come.",
              steps="There are [c = a + b] {x}.", a=(5, 60), b=(2, 40)),
    "lost": p("The {place} has {a} {x}, and {b} of them are lost.", "There were {a} {x} in the {place}. {b} of them were lost.",
              steps="There are [c = a - b] {x} left.", a=(12, 99), b=(2, 60)),
}, {
    "come": p("Then {k} more {x} come. | How many {x} are there now?",
              "Later {k} more {x} come. | How many {x} are there in all?",
              steps="There are [v = u + k] {x}.", k=(2, 40)),
    "sold": p("Then {k} {x} are sold. | How many {x} are left?", "Later {k} of the {x} are sold. | How many {x} remain?",
              steps="There are [v = u - k] {x} left.", k=(2, 40)),
    "share": p("The {x} are shared equally among {k} children. | How many {x} does each child get?",
               "All {x} go in equal parts to {k} children. | How many {x} does each of the children get?",
               steps="Each child gets [v = u / k] {x}.", k=(2, 6)),
    "price": p("All of the {x} are sold at ${k} each. | How many dollars is that?",
               "Each of the {x} is sold for ${k}. | How many dollars is that in all?",
               steps="That is [v = u * k] dollars.", k=(2, 6)),
}, """
shelves  come sold share price
more     sold share price
lost     come share come+sold
""")  # fmt: skip

_MONEY = chains("purse", {
    "wage": p("{N} earns ${a} an hour and works {b} hours.", "{N} works {b} hours at ${a} an hour.",
              steps="{N} gets [c = a * b] dollars.", a=(3, 15), b=(2, 9)),
    "weekly": p("{N} saves ${a} a week for {b} weeks.", "For {b} weeks {N} saves ${a} a week.",
                steps="{N} has [c = a * b] dollars.", a=(2, 12), b=(2, 12)),
    "sells": p("{N} sells {a} {x} at ${b} each.", "{N} gets ${b} for each of {a} {x}.",
               steps="{N} gets [c = a * b] dollars.", a=(3, 12), b=(2, 12)),
    "gets": p("{N} has ${a} and gets ${b} more.", "{N} had ${a} and then got ${b} more.",
              steps="{N} has [c = a + b] dollars.", a=(3, 60), b=(2, 40)),
    "spent": p("{N} has ${a} and spends ${b}.", "{N} had ${a} and paid ${b} for a book.",
               steps="{N} has [c = a - b] dollars left.", a=(20, 99), b=(2, 50)),
}, {
    "gain": p("Then {N} gets ${k} more. | How many dollars does {N} have now?",
              "Later {N} finds ${k} more. | How many dollars does {N} have in all?",
              steps="{N} has [v = u + k] dollars.", k=(2, 40)),
    "spend": p("Then {N} spends ${k}. | How many dollars does {N} have left?",
               "Later {N} pays ${k} for a lamp. | How many dollars does {N} still have?",
               steps="{N} has [v = u - k] dollars left.", k=(2, 40)),
    "buy": p("Then {N} buys {k} {y} at ${m} each. | How many dollars does {N} have left?",
             "Later {N} pays ${m} for each of {k} {y}. | How many dollars does {N} still have?",
             steps="The {y} cost [w = k * m] dollars. {N} has [v = u - w] dollars left.", k=(2, 9), m=(2, 9)),
    "share": p("{N} shares the money equally among {k} friends. | How many dollars does each friend get?",
               "{N} gives all the money in equal parts to {k} friends. | How many dollars does each of the friends get?",
               steps="Each friend gets [v = u / k] dollars.", k=(2, 6)),
    "how_many": p("With all of the money {N} buys {y} at ${k} each. | How many {y} does {N} buy?",
                  "{N} spends all of it on {y} at ${k} each. | How many {y} does {N} get?",
                  steps="{N} buys [v = u / k] {y}.", k=(2, 6)),
    "goal": p("{N} wants to have ${k}. | How many more dollars does {N} need?",
              "A bicycle costs ${k}. {N} wants to buy it. | How many dollars are missing?",
              steps="{N} needs [v = k - u] more dollars.", k=(40, 180)),
    "together": p("{M} has ${k}. | How many dollars do they have together?",
                  "{M} brings ${k}. | How many dollars do {N} and {M} have in all?",
                  steps="Together they have [v = u + k] dollars.", k=(2, 60)),
    "gap": p("{M} has ${k}. | How many more dollars does {N} have than {M}?",
             "{M} has only ${k}. | How many more dollars does {N} have?",
             steps="{N} has [v = u - k] more dollars.", k=(2, 60)),
}, """
wage    gain spend share how_many together gap gain+spend
weekly  gain buy how_many goal together spend+gain
sells   gain spend share goal gap
gets    spend buy share how_many together
spent   gain buy share goal gain+share
""")  # fmt: skip

_COSTS = chains("cost", {
    "price": p("{N} buys {a} {x} at ${b} each.", "{N} buys {a} {x}. Each of the {x} costs ${b}.",
               steps="The {x} cost [c = a * b] dollars.", a=(2, 12), b=(2, 12)),
    "tickets": p("{N} buys {a} tickets to the {place} at ${b} each.",
                 "One ticket to the {place} costs ${b}. {N} buys {a} tickets.",
                 steps="The tickets cost [c = a * b] dollars.", a=(2, 12), b=(2, 12)),
    "two": p("{N} buys a lamp for ${a} and a chair for ${b}.", "A lamp costs ${a} and a chair costs ${b}. {N} buys both.",
             steps="Together they cost [c = a + b] dollars.", a=(5, 60), b=(5, 40)),
    "off": p("{N} buys a coat of ${a} that is ${b} off.", "A coat costs ${a}, but now it is ${b} off. {N} buys it.",
             steps="The coat costs [c = a - b] dollars.", a=(20, 99), b=(2, 40)),
}, {
    "change": p("{N} pays with ${k}. | How many dollars does {N} get back?",
                "{N} gives ${k}. | How many dollars of change does {N} get?",
                steps="{N} gets back [v = k - u] dollars.", k=(20, 150)),
    "plus": p("{N} also buys a book for ${k}. | How many dollars does {N} pay?",
              "{N} takes a book for ${k} as well. | How many dollars does {N} pay in all?",
              steps="In all {N} pays [v = u + k] dollars.", k=(2, 40)),
    "coupon": p("A coupon takes ${k} off. | How many dollars does {N} pay?",
                "{N} has a coupon of ${k}. | How many dollars must {N} still pay?",
                steps="{N} pays [v = u - k] dollars.", k=(2, 20)),
    "split": p("The cost is shared equally by {k} friends. | How many dollars does each friend pay?",
               "{k} friends pay equal parts of it. | How many dollars does each of the friends pay?",
               steps="Each friend pays [v = u / k] dollars.", k=(2, 6)),
    "also": p("{N} also buys {k} {y} at ${m} each. | How many dollars does {N} pay?",
              "{N} takes {k} {y} at ${m} each as well. | How many dollars does {N} pay in all?",
              steps="The {y} cost [w = k * m] dollars. In all {N} pays [v = u + w] dollars.", k=(2, 9), m=(2, 9)),
}, """
price    plus coupon split coupon+change
tickets  change plus split coupon
two      change coupon also
off      change plus split also
""")  # fmt: skip

_WAYS = chains("way", {
    "speed": p("{N} rides {a} km an hour for {b} hours.", "For {b} hours {N} rides {a} km an hour.",
               steps="{N} goes [c = a * b] km.", a=(5, 20), b=(2, 8)),
    "daily": p("{N} walks {a} km a day for {b} days.", "For {b} days {N} walks {a} km a day.",
               steps="{N} goes [c = a * b] km.", a=(3, 15), b=(2, 9)),
    "laps": p("{N} runs {a} laps of {b} km.", "One lap is {b} km long. {N} runs {a} laps.",
              steps="{N} goes [c = a * b] km.", a=(2, 12), b=(2, 9)),
    "two": p("{N} goes {a} km on Monday and {b} km on Tuesday.", "On one day {N} goes {a} km, on the next day {b} km.",
             steps="{N} goes [c = a + b] km.", a=(3, 60), b=(2, 40)),
}, {
    "further": p("Then {N} goes {k} km more. | How many km does {N} go in all?",
                 "Later {N} goes another {k} km. | How many km is that in all?",
                 steps="In all {N} goes [v = u + k] km.", k=(2, 40)),
    "rest": p("The whole way is {k} km. | How many km are left?",
              "The trip is {k} km long. | How many km must {N} still go?",
              steps="There are [v = k - u] km left.", k=(40, 190)),
    "back": p("Then {N} goes the same way back. | How many km does {N} go in all?",
              "Later {N} goes all of it again. | How many km is that in all?",
              steps="In all {N} goes [v = 2 * u] km."),
    "other_more": p("{M} goes {k} km more than {N}. | How many km does {M} go?",
                    "{M} goes {k} km further than {N}. | How far does {M} go in km?",
                    steps="{M} goes [v = u + k] km.", k=(2, 40)),
    "other_fewer": p("{M} goes {k} km less than {N}. | How many km does {M} go?",
                     "{M} stops {k} km before {N}. | How far does {M} go in km?",
                     steps="{M} goes [v = u - k] km.", k=(2, 40)),
    "together": p("{M} goes {k} km. | How many km do they go together?",
                  "{M} goes {k} km too. | How many km do {N} and {M} go in all?",
                  steps="Together they go [v = u + k] km.", k=(2, 60)),
}, """
speed  further rest other_more together
daily  further back other_fewer
laps   rest back other_more together
two    further back other_fewer further+rest
""")  # fmt: skip

_PEOPLE = chains("people", {
    "on": p("{a} people ride a bus, and {b} more get on.", "A bus has {a} people. At the {place} {b} more get on.",
            steps="There are [c = a + b] people.", a=(5, 60), b=(2, 40)),
    "off": p("{a} people ride a bus, and {b} of them get off.", "A bus has {a} people. At the {place} {b} of them get off.",
             steps="There are [c = a - b] people left.", a=(12, 90), b=(2, 50)),
    "groups": p("There are {a} groups of {b} people in the {place}.", "In the {place} there are {a} groups of {b} people each.",
                steps="There are [c = a * b] people.", a=(2, 12), b=(2, 12)),
    "mixed": p("There are {a} men and {b} women in the {place}.", "{a} men and {b} women come to the {place}.",
               steps="There are [c = a + b] people.", a=(3, 50), b=(2, 50)),
}, {
    "come": p("Then {k} more people come. | How many people are there now?",
              "Later {k} more people come. | How many people are there in all?",
              steps="There are [v = u + k] people.", k=(2, 40)),
    "leave": p("Then {k} people leave. | How many people are left?",
               "Later {k} of the people leave. | How many people remain?",
               steps="There are [v = u - k] people left.", k=(2, 40)),
    "teams": p("They form teams of {k}. | How many teams are there?",
               "They make teams of {k} people each. | How many teams do they make?",
               steps="There are [v = u / k] teams.", k=(2, 6)),
    "tables": p("Then they sit down at tables of {k}. | How many tables do they need?",
                "Later {k} people sit at each table. | How many tables are needed?",
                steps="They need [v = u / k] tables.", k=(2, 6)),
    "each": p("Each of them gets {k} {x}. | How many {x} are there in all?",
              "Each of the people brings {k} {x}. | How many {x} is that in all?",
              steps="There are [v = u * k] {x}.", k=(2, 6)),
    "seats": p("There are {k} seats. | How many seats are free?",
               "There are {k} seats, and everyone sits down. | How many seats are not taken?",
               steps="There are [v = k - u] free seats.", k=(20, 150)),
}, """
on      come leave tables each
off     leave each seats come+tables
groups  come teams tables seats
mixed   come leave each leave+teams
""")  # fmt: skip

_PAGES = chains("pages", {
    "daily": p("{N} reads {a} pages a day for {b} days.", "For {b} days {N} reads {a} pages a day.",
               steps="{N} reads [c = a * b] pages.", a=(3, 20), b=(2, 9)),
    "two": p("{N} reads {a} pages on Monday and {b} on Tuesday.", "On one day {N} reads {a} pages, on the next day {b}.",
             steps="{N} reads [c = a + b] pages.", a=(3, 60), b=(2, 40)),
    "chapters": p("{N} reads {a} chapters of {b} pages.", "One chapter has {b} pages. {N} reads {a} chapters of this kind.",
                  steps="{N} reads [c = a * b] pages.", a=(2, 9), b=(3, 20)),
}, {
    "further": p("Then {N} reads {k} more pages. | How many pages does {N} read in all?",
                 "Later {N} reads another {k} pages. | How many pages is that in all?",
                 steps="In all {N} reads [v = u + k] pages.", k=(2, 40)),
    "rest": p("The whole book has {k} pages. | How many pages are left?",
              "The book is {k} pages long. | How many pages must {N} still read?",
              steps="There are [v = k - u] pages left.", k=(40, 190)),
    "other_more": p("{M} reads {k} more pages than {N}. | How many pages does {M} read?",
                    "{M} reads {k} pages more than {N}. | How many pages does {M} read in all?",
                    steps="{M} reads [v = u + k] pages.", k=(2, 40)),
    "together": p("{M} reads {k} pages. | How many pages do they read together?",
                  "{M} reads {k} pages too. | How many pages do {N} and {M} read in all?",
                  steps="Together they read [v = u + k] pages.", k=(2, 60)),
}, """
daily     further other_more together further+rest
two       rest other_more together
chapters  further rest together
""")  # fmt: skip

_AGES = chains("age", {
    "older": p("{N} is {a} years old. {M} is {b} years older.", "{M} is {b} years older than {N}, who is {a}.",
               steps="{M} is [c = a + b] years old.", a=(3, 50), b=(2, 30)),
    "younger": p("{N} is {a} years old. {M} is {b} years younger.", "{M} is {b} years younger than {N}, who is {a}.",
                 steps="{M} is [c = a - b] years old.", a=(12, 80), b=(2, 30)),
    "times": p("{N} is {a} years old. {M} is {b} times as old.", "{M} is {b} times as old as {N}, who is {a}.",
               steps="{M} is [c = b * a] years old.", a=(3, 20), b=(2, 5)),
}, {
    "later": p("| How old will {M} be in {k} years?", "{k} years go by. | How old is {M} then?",
               steps="{M} will be [v = u + k] years old.", k=(2, 15)),
    "ago": p("| How old was {M} {k} years ago?", "We look {k} years back. | How old was {M} then?",
             steps="{M} was [v = u - k] years old.", k=(2, 15)),
    "sum": p("| How old are they together?", "| What is the sum of their two ages?",
             steps="Together they are [v = a + u] years old."),
    "friend": p("Their friend is {k} years younger than {M}. | How old is the friend?",
                "{M} has a friend who is {k} years younger. | How old is this friend?",
                steps="The friend is [v = u - k] years old.", k=(2, 20)),
}, """
older    later ago friend
younger  later ago sum
times    later ago sum friend
""")  # fmt: skip


def _measured(unit: str, bag: str, stuff: str) -> tuple[Template, ...]:
    """What is weighed, poured or cut: the same chains for each unit."""
    return chains(unit, {
        "bags": p(f"{{N}} has {{a}} {bag}s of {{b}} {unit} of {stuff}.", f"Each of {{a}} {bag}s holds {{b}} {unit} of {stuff}.",
                  steps=f"There are [c = a * b] {unit}.", a=(2, 12), b=(2, 12)),
        "two": p(f"One {bag} holds {{a}} {unit} of {stuff} and another holds {{b}}.",
                 f"{{N}} has {{a}} {unit} of {stuff} in one {bag} and {{b}} {unit} in another.",
                 steps=f"There are [c = a + b] {unit}.", a=(3, 60), b=(2, 40)),
        "used": p(f"{{N}} has {{a}} {unit} of {stuff} and uses {{b}}.",
                  f"From {{a}} {unit} of {stuff} {{N}} uses {{b}} {unit}.",
                  steps=f"There are [c = a - b] {unit} left.", a=(12, 99), b=(2, 60)),
    }, {
        "come": p(f"Then {{N}} gets {{k}} {unit} more. | How many {unit} are there now?",
                  f"Later {{N}} buys another {{k}} {unit}. | How many {unit} are there in all?",
                  steps=f"There are [v = u + k] {unit}.", k=(2, 40)),
        "use": p(f"Then {{N}} sells {{k}} {unit}. | How many {unit} are left?",
                 f"Later {{k}} {unit} are lost. | How many {unit} remain?",
                 steps=f"There are [v = u - k] {unit} left.", k=(2, 40)),
        "parts": p(f"{{N}} shares the {stuff} equally among {{k}} friends. | How many {unit} does each friend get?",
                   f"{{N}} gives all the {stuff} in equal parts to {{k}} friends. | "
                   f"How many {unit} does each of the friends get?",
                   steps=f"Each friend gets [v = u / k] {unit}.", k=(2, 6)),
        "price": p(f"{{N}} sells all of the {stuff} at ${{k}} a {unit.rstrip('s')}. | How many dollars does {{N}} get?",
                   f"{{N}} gets ${{k}} for each {unit.rstrip('s')}. | How many dollars does {{N}} get in all?",
                   steps="{N} gets [v = u * k] dollars.", k=(2, 6)),
    }, """
    bags  come use parts price
    two   use parts price
    used  come parts price
    """)  # fmt: skip


_FLOORS = chains("floor", {
    "area": p("A floor is {a} m long and {b} m wide.", "The floor of the {place} is {a} m by {b} m.",
              steps="The floor is [c = a * b] square m.", a=(2, 12), b=(2, 12)),
}, {
    "cost": p("Each square m costs ${k}. | How many dollars does the floor cost?",
              "{N} pays ${k} for each square m. | How many dollars does {N} pay?",
              steps="The floor costs [v = u * k] dollars.", k=(2, 6)),
    "carpet": p("A carpet covers {k} square m. | How many square m are left?",
                "{N} has cleaned {k} square m. | How many square m remain?",
                steps="There are [v = u - k] square m left.", k=(2, 60)),
    "plus": p("Another floor has {k} square m. | How many square m are there in all?",
              "A second floor has {k} square m. | How many square m do they have together?",
              steps="Together they have [v = u + k] square m.", k=(4, 60)),
}, "area cost carpet plus") + chains("fence", {
    "around": p("A garden is {a} m long and {b} m wide.", "{N} has a garden of {a} m by {b} m.",
                steps="Two sides are [c = a + b] m. Around it is [d = 2 * c] m.", a=(2, 25), b=(2, 15)),
    "square": p("A square garden has sides of {a} m.", "Each side of a square garden is {a} m long.",
                steps="Around it is [c = 4 * a] m.", a=(2, 40)),
}, {
    "cost": p("A fence around it costs ${k} a m. | How many dollars does the fence cost?",
              "{N} pays ${k} for each m of fence around it. | How many dollars does {N} pay?",
              steps="The fence costs [v = u * k] dollars.", k=(2, 8)),
    "gate": p("{k} m of the fence around it are a gate. | How many m are left?",
              "{N} has {k} m of the fence around it ready. | How many m remain?",
              steps="There are [v = u - k] m left.", k=(2, 40)),
    "posts": p("The fence around it has a post every {k} m. | How many posts does the fence have?",
               "{N} sets a post every {k} m around it. | How many posts does {N} set?",
               steps="There are [v = u / k] posts.", k=(2, 6)),
    "walk": p("{N} walks around it {k} times. | How many m does {N} walk?",
              "Every day {N} walks around it once. | How many m does {N} walk in {k} days?",
              steps="{N} walks [v = k * u] m.", k=(2, 5)),
}, """
around  gate posts walk
square  cost gate posts
""")  # fmt: skip

_TIMES = chains("time", {
    "each": p("{N} needs {a} minutes for each of {b} {x}.", "{N} paints {b} {x} in {a} minutes each.",
              steps="{N} works [c = b * a] minutes.", a=(2, 15), b=(2, 9)),
    "two": p("{N} works {a} minutes on Monday and {b} on Tuesday.", "On one day {N} works {a} minutes, on the next day {b}.",
             steps="{N} works [c = a + b] minutes.", a=(5, 60), b=(5, 60)),
    "hours": p("{N} works {a} hours and {b} minutes.", "The work of {N} takes {a} hours and {b} minutes.",
               steps="The hours are [c = a * 60] minutes. {N} works [d = c + b] minutes.", a=(1, 2), b=(5, 55)),
}, {
    "further": p("Then {N} works {k} minutes more. | How many minutes does {N} work in all?",
                 "Later {N} works another {k} minutes. | How many minutes is that in all?",
                 steps="In all {N} works [v = u + k] minutes.", k=(5, 40)),
    "other_fewer": p("{M} works {k} minutes less than {N}. | How many minutes does {M} work?",
                     "{M} stops {k} minutes earlier than {N}. | How long does {M} work in minutes?",
                     steps="{M} works [v = u - k] minutes.", k=(2, 40)),
    "rest": p("The whole work takes {k} minutes. | How many minutes are left?",
              "The work is {k} minutes long. | How many minutes must {N} still work?",
              steps="There are [v = k - u] minutes left.", k=(40, 190)),
}, """
each   further other_fewer rest
two    further rest
hours  further other_fewer
""")  # fmt: skip


def _limbs(first: str, one: int, second: str, other: int, limbs: str) -> Template:
    """Legs or wheels of two kinds."""
    return t(
        f"{limbs}_{first}_{second}",
        f"A {first} has {one} {limbs} and a {second} has {other}. How many {limbs} do {{a}} {first}s and {{b}} {second}s have?",
        f"{{N}} counts {{a}} {first}s with {one} {limbs} each and {{b}} {second}s with {other} {limbs} each. "
        f"How many {limbs} are there in all?",
        steps=f"The {first}s have [c = a * {one}] {limbs}. The {second}s have [d = b * {other}] {limbs}. "
        f"Together they have [e = c + d] {limbs}.",
        a=(2, 12),
        b=(2, 12),
    )


_LIMBS = tuple(
    _limbs(*row)
    for row in [
        ("bicycle", 2, "car", 4, "wheels"),
        ("tricycle", 3, "bicycle", 2, "wheels"),
        ("car", 4, "tricycle", 3, "wheels"),
        ("hen", 2, "cow", 4, "legs"),
        ("dog", 4, "duck", 2, "legs"),
        ("chair", 4, "stool", 3, "legs"),
        ("dog", 4, "hen", 2, "legs"),
        ("cow", 4, "duck", 2, "legs"),
    ]
)

CHAINS: tuple[Template, ...] = (
    _THINGS + _PLACES + _MONEY + _COSTS + _WAYS + _PEOPLE + _PAGES + _AGES
    + _measured("kg", "bag", "flour") + _measured("liters", "can", "milk") + _measured("m", "roll", "cloth")
    + _FLOORS + _TIMES + _LIMBS
)  # fmt: skip
