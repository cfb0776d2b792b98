//! Python's pickles, as far as they are data: a machine of numbers, texts and containers. Whatever a pickle would call is
//! kept as a name with its arguments, and nothing is called.

use std::fmt;
use std::io::{self, BufRead, Read};

/// Most objects of one pickle, and most references between them: a checkpoint has thousands.
const MAX_OBJECTS: usize = 2 << 20;
/// Longest pickle, in bytes; tensors are not in it.
const MAX_BYTES: usize = 64 << 20;
/// Longest text that stands in a line of its own.
const MAX_LINE: usize = 1 << 16;

/// An object's place in its [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Id(u32);

/// What an object is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Object {
    /// `None`.
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    /// Bytes, and whole numbers beyond 64 bits, which nothing here asks for.
    Opaque,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function, `module.name`.
    Global(String),
    /// What lies outside the pickle, by its key.
    Persistent(Id),
    /// What a class or function would have made of `arguments`, what it was given since, and its own state.
    Made {
        by: Id,
        arguments: Id,
        items: Vec<(Id, Id)>,
        list: Vec<Id>,
        state: Option<Id>,
    },
}

/// Why bytes are no pickle that is read here.
#[derive(Debug)]
pub(super) enum PickleError {
    /// They cannot be read.
    Io(io::Error),
    /// They end, or go on, as no pickle does.
    Form(String),
    /// There are more than any checkpoint's weights need.
    Large(String),
}

impl From<io::Error> for PickleError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Form("it ends in the middle".into()),
            _ => Self::Io(error),
        }
    }
}

impl fmt::Display for PickleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Form(reason) | Self::Large(reason) => f.write_str(reason),
        }
    }
}

fn wrong<T>(reason: impl Into<String>) -> Result<T, PickleError> {
    Err(PickleError::Form(reason.into()))
}

fn large<T>(what: &str, limit: usize) -> Result<T, PickleError> {
    Err(PickleError::Large(format!("more than {limit} {what}")))
}

/// A pickle's objects. Containers hold places, so that an object may hold itself.
#[derive(Debug)]
pub(super) struct Pickle {
    objects: Vec<Object>,
    root: Id,
}

impl Pickle {
    /// Reads one pickle and nothing behind it.
    ///
    /// # Errors
    /// When it is none, or larger than any checkpoint's.
    pub(super) fn read(input: &mut impl BufRead) -> Result<Self, PickleError> {
        let mut machine = Machine { input, taken: 0, references: 0, objects: Vec::new(), stack: Vec::new() };
        let mut memo = Memo::default();
        loop {
            if let Some(root) = machine.step(&mut memo)? {
                return Ok(Self { objects: machine.objects, root });
            }
        }
    }

    pub(super) fn root(&self) -> Id {
        self.root
    }

    /// Every object, in the order in which they were read.
    pub(super) fn ids(&self) -> impl Iterator<Item = Id> {
        (0..self.objects.len() as u32).map(Id)
    }

    pub(super) fn get(&self, id: Id) -> &Object {
        // Places are given out by this type alone.
        self.objects.get(id.0 as usize).unwrap_or(&Object::None)
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        if let Object::Text(text) = self.get(id) { Some(text) } else { None }
    }

    pub(super) fn int(&self, id: Id) -> Option<i64> {
        if let Object::Int(int) = self.get(id) { Some(*int) } else { None }
    }

    /// The elements of a tuple or list.
    pub(super) fn elements(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Object::Tuple(elements) | Object::List(elements) => Some(elements),
            _ => None,
        }
    }

    /// The whole numbers of a tuple or list, none of them negative.
    pub(super) fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let size = |&id| self.int(id).and_then(|int| usize::try_from(int).ok());
        match self.get(id) {
            Object::Tuple(elements) | Object::List(elements) => elements.iter().map(size).collect(),
            // torch.Size, a tuple made from a tuple.
            Object::Made { arguments, .. } => {
                self.elements(*self.elements(*arguments)?.first()?)?.iter().map(size).collect()
            }
            _ => None,
        }
    }

    /// The name of the class or function that `id` is, or that made it.
    pub(super) fn class(&self, id: Id) -> Option<&str> {
        let of = if let Object::Made { by, .. } = self.get(id) { *by } else { id };
        match self.get(of) {
            Object::Global(name) => Some(name),
            // The older form keeps classes of modules with their source: ("module", class, file, source).
            Object::Persistent(parts) => match self.get(*self.elements(*parts)?.get(1)?) {
                Object::Global(name) => Some(name),
                _ => None,
            },
            _ => None,
        }
    }

    /// The entries of a dictionary of any class, in their order.
    pub(super) fn entries(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Object::Dict(entries) => Some(entries),
            Object::Made { items, .. } if !items.is_empty() => Some(items),
            _ => None,
        }
    }

    /// What stands under the text `key` in a dictionary, the last of several.
    pub(super) fn entry(&self, id: Id, key: &str) -> Option<Id> {
        self.entries(id)?.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }
}

/// What later steps name again.
#[derive(Default)]
struct Memo(Vec<Option<Id>>);

impl Memo {
    fn get(&self, index: usize) -> Result<Id, PickleError> {
        self.0.get(index).copied().flatten().map_or_else(|| wrong("it names an object that it does not have"), Ok)
    }

    fn put(&mut self, index: usize, id: Id) -> Result<(), PickleError> {
        if index >= MAX_OBJECTS {
            return wrong("it numbers an object beyond what any checkpoint has");
        }
        if index >= self.0.len() {
            self.0.resize(index + 1, None);
        }
        self.0[index] = Some(id);
        Ok(())
    }
}

/// `None` marks where a group begins.
struct Machine<'a, R> {
    input: &'a mut R,
    taken: usize,
    references: usize,
    objects: Vec<Object>,
    stack: Vec<Option<Id>>,
}

impl<R: BufRead> Machine<'_, R> {
    /// One operation (the table in CPython's Lib/pickletools.py); the object that the pickle is at its end.
    fn step(&mut self, memo: &mut Memo) -> Result<Option<Id>, PickleError> {
        match self.byte()? {
            0x80 => drop(self.byte()?),    // PROTO
            0x95 => drop(self.number(8)?), // FRAME
            b'.' => return self.pop().map(Some),
            b'(' => self.stack.push(None),
            b'0' => match self.stack.pop() {
                Some(_) => {}
                None => return wrong("it takes more than it has"),
            },
            b'1' => drop(self.group()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(Some(top));
            }
            b'N' => self.push(Object::None)?,
            0x88 => self.push(Object::Bool(true))?,
            0x89 => self.push(Object::Bool(false))?,
            b'I' => {
                let line = self.line()?;
                self.push(match line.as_str() {
                    "00" => Object::Bool(false),
                    "01" => Object::Bool(true),
                    number => number.parse().map_or(Object::Opaque, Object::Int),
                })?;
            }
            b'L' => {
                let line = self.line()?;
                self.push(line.trim_end_matches('L').parse().map_or(Object::Opaque, Object::Int))?;
            }
            b'F' => {
                let line = self.line()?;
                self.push(line.parse().map_or(Object::Opaque, Object::Float))?;
            }
            b'K' => self.whole(1)?,
            b'M' => self.whole(2)?,
            b'J' => {
                let number = self.number(4)? as u32;
                self.push(Object::Int(i64::from(number.cast_signed())))?;
            }
            0x8a => {
                let length = self.number(1)?;
                self.long(length)?;
            }
            0x8b => {
                let length = self.number(4)?;
                self.long(length)?;
            }
            b'G' => {
                let bytes: [u8; 8] = self.array()?;
                self.push(Object::Float(f64::from_be_bytes(bytes)))?;
            }
            b'S' | b'V' => {
                let line = self.line()?;
                self.push(Object::Text(line.trim_matches(['\'', '"']).to_owned()))?;
            }
            b'X' | b'T' => self.text(4)?,
            b'U' | 0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'B' => self.opaque(4)?,
            b'C' => self.opaque(1)?,
            0x8e | 0x96 => self.opaque(8)?,
            b')' => self.push(Object::Tuple(Vec::new()))?,
            b']' => self.push(Object::List(Vec::new()))?,
            b'}' => self.push(Object::Dict(Vec::new()))?,
            0x8f => self.push(Object::List(Vec::new()))?, // EMPTY_SET
            b't' => {
                let group = self.group()?;
                self.push(Object::Tuple(group))?;
            }
            count @ 0x85..=0x87 => {
                let first = self.stack.len().checked_sub(usize::from(count - 0x84));
                let elements = first.map(|first| self.stack.split_off(first)).unwrap_or_default();
                match elements.into_iter().collect::<Option<Vec<_>>>() {
                    Some(elements) if !elements.is_empty() => self.push(Object::Tuple(elements))?,
                    _ => return wrong("it takes more than it has"),
                }
            }
            b'l' | 0x91 => {
                let group = self.group()?;
                self.push(Object::List(group))?;
            }
            b'd' => {
                let entries = pairs(self.group()?)?;
                self.push(Object::Dict(entries))?;
            }
            b'a' => {
                let element = self.pop()?;
                self.append(vec![element])?;
            }
            b'e' | 0x90 => {
                let group = self.group()?;
                self.append(group)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(vec![(key, value)])?;
            }
            b'u' => {
                let entries = pairs(self.group()?)?;
                self.set(entries)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(format!("{module}.{name}")))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(Object::Text(module)), Some(Object::Text(name))) = (self.object(module), self.object(name))
                else {
                    return wrong("it names a class by something other than text");
                };
                let name = format!("{module}.{name}");
                self.push(Object::Global(name))?;
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                let arguments = self.group()?;
                let by = self.add(Object::Global(format!("{module}.{name}")))?;
                self.make(by, arguments)?;
            }
            b'o' => {
                let mut group = self.group()?.into_iter();
                let Some(by) = group.next() else { return wrong("it makes an object of no class") };
                self.make(by, group.collect())?;
            }
            b'R' | 0x81 => {
                let (arguments, by) = (self.pop()?, self.pop()?);
                self.made(by, arguments)?;
            }
            0x92 => {
                let (_, arguments, by) = (self.pop()?, self.pop()?, self.pop()?);
                self.made(by, arguments)?;
            }
            b'b' => {
                let given = self.pop()?;
                let top = self.top()?;
                if let Some(Object::Made { state, .. }) = self.objects.get_mut(top.0 as usize) {
                    *state = Some(given);
                }
            }
            b'g' => {
                let index = self.line()?.parse().map_or_else(|_| wrong("it names an object by no number"), Ok)?;
                self.stack.push(Some(memo.get(index)?));
            }
            b'h' => self.again(memo, 1)?,
            b'j' => self.again(memo, 4)?,
            b'p' => {
                let index = self.line()?.parse().map_or_else(|_| wrong("it numbers an object by no number"), Ok)?;
                memo.put(index, self.top()?)?;
            }
            b'q' => {
                let index = self.number(1)? as usize;
                memo.put(index, self.top()?)?;
            }
            b'r' => {
                let index = self.number(4)? as usize;
                memo.put(index, self.top()?)?;
            }
            0x94 => memo.put(memo.0.len(), self.top()?)?,
            b'P' => {
                let line = self.line()?;
                let key = self.add(Object::Text(line))?;
                self.push(Object::Persistent(key))?;
            }
            b'Q' => {
                let key = self.pop()?;
                self.push(Object::Persistent(key))?;
            }
            other => return wrong(format!("it has an operation {other:#04x}, which no checkpoint has")),
        }
        if self.stack.len() > MAX_OBJECTS {
            return large("objects", MAX_OBJECTS);
        }
        Ok(None)
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        self.count(N)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn count(&mut self, bytes: usize) -> Result<(), PickleError> {
        self.taken = self.taken.saturating_add(bytes);
        if self.taken > MAX_BYTES {
            return large("bytes", MAX_BYTES);
        }
        Ok(())
    }

    /// A number of `size` bytes, the least significant first.
    fn number(&mut self, size: usize) -> Result<u64, PickleError> {
        let mut number = 0;
        for at in 0..size {
            number |= u64::from(self.byte()?) << (8 * at);
        }
        Ok(number)
    }

    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, PickleError> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        self.count(length)?;
        let mut bytes = Vec::new();
        // What is not there is not allocated.
        io::Read::take(&mut *self.input, length as u64).read_to_end(&mut bytes)?;
        if bytes.len() < length {
            return wrong("it ends in the middle");
        }
        Ok(bytes)
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let mut bytes = Vec::new();
        io::Read::take(&mut *self.input, MAX_LINE as u64).read_until(b'\n', &mut bytes)?;
        self.count(bytes.len())?;
        if bytes.pop() != Some(b'\n') {
            return wrong("it has a line without an end");
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn whole(&mut self, size: usize) -> Result<(), PickleError> {
        let number = self.number(size)?.cast_signed();
        self.push(Object::Int(number))
    }

    fn long(&mut self, length: u64) -> Result<(), PickleError> {
        let bytes = self.bytes(length)?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        if bytes.len() > number.len() {
            return self.push(Object::Opaque);
        }
        number[..bytes.len()].copy_from_slice(&bytes);
        self.push(Object::Int(i64::from_le_bytes(number)))
    }

    fn text(&mut self, size: usize) -> Result<(), PickleError> {
        let length = self.number(size)?;
        let bytes = self.bytes(length)?;
        self.push(Object::Text(String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn opaque(&mut self, size: usize) -> Result<(), PickleError> {
        // Passed over: arrays of NumPy may be large.
        let length = self.number(size)?;
        if io::copy(&mut io::Read::take(&mut *self.input, length), &mut io::sink())? < length {
            return wrong("it ends in the middle");
        }
        self.push(Object::Opaque)
    }

    fn again(&mut self, memo: &Memo, size: usize) -> Result<(), PickleError> {
        let index = self.number(size)? as usize;
        self.stack.push(Some(memo.get(index)?));
        Ok(())
    }

    fn object(&self, id: Id) -> Option<&Object> {
        self.objects.get(id.0 as usize)
    }

    fn add(&mut self, object: Object) -> Result<Id, PickleError> {
        if self.objects.len() >= MAX_OBJECTS {
            return large("objects", MAX_OBJECTS);
        }
        self.objects.push(object);
        Ok(Id(self.objects.len() as u32 - 1))
    }

    fn push(&mut self, object: Object) -> Result<(), PickleError> {
        let id = self.add(object)?;
        self.stack.push(Some(id));
        Ok(())
    }

    fn make(&mut self, by: Id, arguments: Vec<Id>) -> Result<(), PickleError> {
        let arguments = self.add(Object::Tuple(arguments))?;
        self.made(by, arguments)
    }

    fn made(&mut self, by: Id, arguments: Id) -> Result<(), PickleError> {
        let items = self.ordered(by, arguments).unwrap_or_default();
        self.refer(items.len())?;
        self.push(Object::Made { by, arguments, items, list: Vec::new(), state: None })
    }

    /// The entries of an ordered dictionary as Python 2 makes it, from a list of pairs.
    fn ordered(&self, by: Id, arguments: Id) -> Option<Vec<(Id, Id)>> {
        let Object::Global(name) = self.object(by)? else { return None };
        let Object::Tuple(arguments) = self.object(arguments)? else { return None };
        let Object::List(pairs) = self.object(*arguments.first()?)? else { return None };
        let pair = |id: &Id| match self.object(*id)? {
            Object::List(pair) | Object::Tuple(pair) => Some((*pair.first()?, *pair.get(1)?)),
            _ => None,
        };
        if name == "collections.OrderedDict" { pairs.iter().map(pair).collect() } else { None }
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        self.stack.pop().flatten().map_or_else(|| wrong("it takes more than it has"), Ok)
    }

    fn top(&self) -> Result<Id, PickleError> {
        self.stack.last().copied().flatten().map_or_else(|| wrong("it takes more than it has"), Ok)
    }

    /// What lies above the last mark, and takes the mark away.
    fn group(&mut self) -> Result<Vec<Id>, PickleError> {
        let Some(mark) = self.stack.iter().rposition(Option::is_none) else {
            return wrong("it ends a group that it did not begin");
        };
        let group: Vec<Id> = self.stack.drain(mark..).flatten().collect();
        self.refer(group.len())?;
        Ok(group)
    }

    fn refer(&mut self, count: usize) -> Result<(), PickleError> {
        self.references += count;
        if self.references > 4 * MAX_OBJECTS {
            return large("elements of containers", 4 * MAX_OBJECTS);
        }
        Ok(())
    }

    /// Adds to whatever is on top: lists, sets, and what classes of others made.
    fn append(&mut self, elements: Vec<Id>) -> Result<(), PickleError> {
        self.refer(elements.len())?;
        let top = self.top()?;
        match self.objects.get_mut(top.0 as usize) {
            Some(Object::List(list) | Object::Made { list, .. }) => list.extend(elements),
            _ => return wrong("it adds elements to something that has none"),
        }
        Ok(())
    }

    /// As [`Self::append`], of entries.
    fn set(&mut self, entries: Vec<(Id, Id)>) -> Result<(), PickleError> {
        self.refer(entries.len())?;
        let top = self.top()?;
        match self.objects.get_mut(top.0 as usize) {
            Some(Object::Dict(items) | Object::Made { items, .. }) => items.extend(entries),
            _ => return wrong("it adds entries to something that has none"),
        }
        Ok(())
    }
}

fn pairs(group: Vec<Id>) -> Result<Vec<(Id, Id)>, PickleError> {
    let (pairs, rest) = group.as_chunks::<2>();
    if !rest.is_empty() {
        return wrong("it has a key without a value");
    }
    Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
}
