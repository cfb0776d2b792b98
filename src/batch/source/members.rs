//! Walks the members of a tar archive in bounded memory. What the format keeps in headers before a member (GNU's long
//! names, PAX records) is read here, within limits. The iterator of the tar crate reads such headers whole, and its raw
//! iterator can step over neither the headers of sparse files nor contents whose size only PAX tells.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::Fault;

/// Bytes of a member's name, at most: PATH_MAX of Linux.
const MAX_NAME: u64 = 4096;
/// Bytes of a PAX header, at most.
const MAX_PAX: u64 = 64 << 10;
const BLOCK: u64 = 512;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    Link,
    /// A file of which only the parts between its holes are stored.
    Sparse,
    /// A device, a pipe, or what the format has no word for.
    Other,
}

/// A member, whose content is read next.
#[derive(Debug)]
pub(super) struct Member {
    /// Bytes that are no UTF-8 are replaced.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Bytes that are stored.
    pub(super) size: u64,
}

/// The members of an archive, in order.
pub(super) struct Members<R> {
    reader: R,
    /// Bytes of the member's content that were not read yet.
    content: u64,
    /// Bytes between the content and the next header.
    padding: u64,
    began: bool,
}

/// What headers said of the member that follows them.
#[derive(Debug, Default)]
struct Extensions {
    long_name: Option<Vec<u8>>,
    long_link: bool,
    pax: Option<Records>,
}

impl Extensions {
    fn any(&self) -> bool {
        self.long_name.is_some() || self.long_link || self.pax.is_some()
    }
}

/// The PAX records that matter here.
#[derive(Debug, Default)]
struct Records {
    path: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
    sparse_name: Option<Vec<u8>>,
}

fn fault(detail: impl Into<String>) -> Fault {
    Fault::new("archive", detail)
}

fn cut_short(what: &str) -> Fault {
    fault(format!("it ends in the middle of {what}"))
}

impl<R: Read> Members<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, content: 0, padding: 0, began: false }
    }

    /// The next member, or none at the archive's end.
    ///
    /// # Errors
    /// When the archive is damaged, is cut short, or has headers beyond the limits.
    pub(super) fn next(&mut self) -> Result<Option<Member>, Fault> {
        let mut extensions = Extensions::default();
        loop {
            let Some(header) = self.header()? else {
                if extensions.any() {
                    return Err(fault("it ends after a header that describes a member"));
                }
                return Ok(None);
            };
            let size = header.entry_size()?;
            // As the tar crate does: old headers have no such types.
            let known = header.as_gnu().is_some() || header.as_ustar().is_some();
            match header.entry_type() {
                EntryType::GNULongName if known => {
                    let twice = extensions.long_name.replace(self.name(size)?).is_some();
                    refuse_twice(twice, "long names")?;
                }
                EntryType::GNULongLink if known => {
                    self.name(size)?;
                    refuse_twice(extensions.long_link, "long link names")?;
                    extensions.long_link = true;
                }
                EntryType::XHeader if known => {
                    let twice = extensions.pax.replace(self.records(size)?).is_some();
                    refuse_twice(twice, "PAX headers")?;
                }
                EntryType::XGlobalHeader if known => {
                    let Records { path, size, sparse, .. } = self.records(size)?;
                    if path.is_some() || size.is_some() || sparse {
                        return Err(fault(
                            "a global PAX header gives all members one path or size, which nbn does not read",
                        ));
                    }
                }
                kind => return self.member(&header, kind, size, extensions).map(Some),
            }
        }
    }

    /// The content of `member`, which was given last, or its first `limit` bytes.
    ///
    /// # Errors
    /// When the archive ends before it.
    pub(super) fn read(&mut self, member: &Member, limit: u64) -> Result<Vec<u8>, Fault> {
        self.content(limit)?.ok_or_else(|| cut_short(&member.name))
    }

    /// The content, or its first `limit` bytes; none when the archive ends before.
    fn content(&mut self, limit: u64) -> Result<Option<Vec<u8>>, Fault> {
        let wanted = self.content.min(limit);
        let mut bytes = Vec::new();
        self.reader.by_ref().take(wanted).read_to_end(&mut bytes)?;
        self.content -= bytes.len() as u64;
        Ok((bytes.len() as u64 == wanted).then_some(bytes))
    }

    fn member(&mut self, header: &Header, kind: EntryType, size: u64, extensions: Extensions) -> Result<Member, Fault> {
        let Records { path, size: pax_size, sparse, sparse_name } = extensions.pax.unwrap_or_default();
        // Where they differ, PAX is right: an old header has no room for more than 8 GiB.
        let size = pax_size.unwrap_or(size);
        self.expect(size)?;
        let kind = match kind {
            EntryType::GNUSparse => {
                self.skip_sparse_headers(header)?;
                Kind::Sparse
            }
            EntryType::Regular if sparse => Kind::Sparse,
            EntryType::Regular => Kind::File,
            EntryType::Directory => Kind::Folder,
            EntryType::Link | EntryType::Symlink => Kind::Link,
            _ => Kind::Other,
        };
        let name = sparse_name.or(extensions.long_name).or(path);
        let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
        Ok(Member { name: String::from_utf8_lossy(&name).into_owned(), kind, size })
    }

    /// The next header, or none at the end.
    fn header(&mut self) -> Result<Option<Header>, Fault> {
        let rest = self.content.saturating_add(self.padding);
        if io::copy(&mut self.reader.by_ref().take(rest), &mut io::sink())? < rest {
            return Err(cut_short("a member"));
        }
        (self.content, self.padding) = (0, 0);
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? {
            return if self.began { Ok(None) } else { Err(fault("it is empty (0 bytes)")) };
        }
        self.began = true;
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The sum's own field counts as blanks.
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        if sum(&bytes[..148]) + sum(&[b' '; 8]) + sum(&bytes[156..]) != header.cksum()? {
            return Err(fault("a header does not match its checksum"));
        }
        self.expect(header.entry_size()?)?;
        Ok(Some(header))
    }

    /// Has `size` bytes of content follow.
    fn expect(&mut self, size: u64) -> Result<(), Fault> {
        let end = size.checked_next_multiple_of(BLOCK);
        let end = end.ok_or_else(|| fault(format!("a member claims {size} bytes, more than an archive can have")))?;
        (self.content, self.padding) = (size, end - size);
        Ok(())
    }

    /// Fills `block`; false when nothing is left.
    fn block(&mut self, block: &mut [u8; BLOCK as usize]) -> Result<bool, Fault> {
        let mut filled = 0;
        while filled < block.len() {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(cut_short("a header")),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Where a sparse file's parts lie stands partly in blocks between its header and its content.
    fn skip_sparse_headers(&mut self, header: &Header) -> Result<(), Fault> {
        let mut more = header.as_gnu().is_some_and(tar::GnuHeader::is_extended);
        let mut block = GnuExtSparseHeader::new();
        while more {
            if !self.block(block.as_mut_bytes())? {
                return Err(cut_short("a sparse file's headers"));
            }
            more = block.is_extended();
        }
        Ok(())
    }

    /// A long name of GNU's, which ends with a zero byte as a rule.
    fn name(&mut self, size: u64) -> Result<Vec<u8>, Fault> {
        refuse_long_name(size.saturating_sub(1))?;
        let mut name = self.content(size)?.ok_or_else(|| cut_short("a long name"))?;
        if name.last() == Some(&0) {
            name.pop();
        }
        refuse_long_name(name.len() as u64)?;
        Ok(name)
    }

    fn records(&mut self, size: u64) -> Result<Records, Fault> {
        if size > MAX_PAX {
            let reason =
                format!("a PAX header has {size} bytes; nbn reads up to {MAX_PAX}: pack it with fewer attributes");
            return Err(fault(reason));
        }
        let header = self.content(size)?.ok_or_else(|| cut_short("a PAX header"))?;
        parse_records(&header)
    }
}

fn refuse_twice(twice: bool, what: &str) -> Result<(), Fault> {
    if twice { Err(fault(format!("two {what} describe the same member"))) } else { Ok(()) }
}

fn refuse_long_name(bytes: u64) -> Result<(), Fault> {
    if bytes <= MAX_NAME {
        return Ok(());
    }
    Err(fault(format!(
        "the name of a member has {bytes} bytes; nbn reads up to {MAX_NAME}: pack it with shorter names"
    )))
}

/// Records are "LENGTH KEY=VALUE\n", where the length is that of the whole record. The last one of a key holds.
fn parse_records(header: &[u8]) -> Result<Records, Fault> {
    let mut records = Records::default();
    let mut rest = header;
    // Some writers fill the header up.
    while !matches!(rest.first(), None | Some(0 | b'\n')) {
        let (key, value, after) = split_record(rest).ok_or_else(|| fault("a PAX header is damaged"))?;
        rest = after;
        match key {
            b"path" | b"GNU.sparse.name" => {
                refuse_long_name(value.len() as u64)?;
                let name = if key == b"path" { &mut records.path } else { &mut records.sparse_name };
                *name = Some(value.to_owned());
            }
            b"size" => {
                let size = str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                records.size = Some(size.ok_or_else(|| fault("the size in a PAX header is not a number of bytes"))?);
            }
            _ => {}
        }
        records.sparse |= key.starts_with(b"GNU.sparse.");
    }
    Ok(records)
}

/// Key and value of the first record, and what follows it.
fn split_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let digits = records.iter().position(|byte| *byte == b' ')?;
    let length: usize = str::from_utf8(&records[..digits]).ok()?.parse().ok()?;
    let (record, after) = records.split_at_checked(length)?;
    let (key, value) = {
        let record = record.get(digits + 1..)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        (&record[..equals], &record[equals + 1..])
    };
    Some((key, value, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of `kind` with `content`, padded.
    fn raw(kind: EntryType, name: &str, content: &[u8]) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_cksum();
        let mut bytes = [header.as_bytes(), content].concat();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn record(key: &str, value: &str) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let length = (1..6).map(|digits| rest + digits).find(|n| n.to_string().len() + rest == *n).unwrap();
        format!("{length} {key}={value}\n").into_bytes()
    }

    type Content = (String, Kind, Vec<u8>);

    /// Names, kinds and contents, and how the walk ended.
    fn walk(archive: &[u8]) -> (Vec<Content>, Result<(), String>) {
        let mut members = Members::new(archive);
        let mut found = Vec::new();
        loop {
            match members.next() {
                Ok(Some(member)) => match members.read(&member, u64::MAX) {
                    Ok(bytes) => found.push((member.name, member.kind, bytes)),
                    Err(fault) => return (found, Err(fault.detail)),
                },
                Ok(None) => return (found, Ok(())),
                Err(fault) => return (found, Err(fault.detail)),
            }
        }
    }

    fn names(archive: &[u8]) -> Vec<String> {
        let (found, ended) = walk(archive);
        ended.unwrap();
        found.into_iter().map(|(name, ..)| name).collect()
    }

    fn end_of(archive: &[u8]) -> String {
        walk(archive).1.unwrap_err()
    }

    #[test]
    fn members_are_those_that_the_tar_crate_finds() {
        let mut builder = tar::Builder::new(Vec::new());
        for (n, length) in [3, 99, 100, 101, 155, 256, 300, 4096].into_iter().enumerate() {
            let name = format!("{n}/{}", "a".repeat(length - 2));
            let mut header = if n % 2 == 0 { Header::new_gnu() } else { Header::new_ustar() };
            header.set_size(n as u64 * 300);
            let long = header.set_path(&name).is_err();
            let mut header = if long { Header::new_gnu() } else { header };
            header.set_size(n as u64 * 300);
            builder.append_data(&mut header, &name, &vec![n as u8; n * 300][..]).unwrap();
        }
        let path = "b".repeat(1000);
        builder.append_pax_extensions([("mtime", &b"1.5\n"[..]), ("path", path.as_bytes())]).unwrap();
        let mut header = Header::new_ustar();
        header.set_size(2);
        header.set_cksum();
        builder.append(&header, &b"hi"[..]).unwrap();
        let mut link = Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "link.png", "c".repeat(200)).unwrap();
        let mut folder = Header::new_gnu();
        folder.set_entry_type(EntryType::Directory);
        folder.set_size(0);
        builder.append_data(&mut folder, "folder/", io::empty()).unwrap();
        let archive = builder.into_inner().unwrap();
        // Its parser takes a line for a record: one with a line end inside of its value hides those behind it (n == 8).
        let mut reader = tar::Archive::new(&archive[..]);
        let expected: Vec<_> = reader
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (entry.path().unwrap().to_string_lossy().into_owned(), bytes)
            })
            .collect();
        let (found, ended) = walk(&archive);
        ended.unwrap();
        assert_eq!(found.len(), 11);
        assert_eq!(found[8].0, path);
        assert_eq!([8, 9, 10].map(|n| found[n].1), [Kind::File, Kind::Link, Kind::Folder]);
        for (n, ((name, _, bytes), (expected, content))) in found.iter().zip(&expected).enumerate() {
            assert_eq!(bytes, content, "{name}");
            assert!(name == expected || n == 8, "{name} {expected}");
        }
    }

    #[test]
    fn headers_beyond_the_limits_are_told_before_they_are_read() {
        let long = |length: usize| {
            let name = [&vec![b'a'; length][..], b"\0"].concat();
            [raw(EntryType::GNULongName, "L", &name), raw(EntryType::Regular, "x", b"")].concat()
        };
        assert_eq!(names(&long(4096)), ["a".repeat(4096)]);
        assert_eq!(
            end_of(&long(4097)),
            "the name of a member has 4097 bytes; nbn reads up to 4096: pack it with shorter names"
        );
        let unended = [raw(EntryType::GNULongName, "L", &[b'a'; 4097]), raw(EntryType::Regular, "x", b"")].concat();
        assert!(end_of(&unended).contains("has 4097 bytes"));
        let link = [raw(EntryType::GNULongLink, "K", &[b'a'; 5000]), raw(EntryType::Symlink, "x", b"")].concat();
        assert!(end_of(&link).contains("has 4999 bytes; nbn reads up to 4096"), "{}", end_of(&link));
        for kind in [EntryType::XHeader, EntryType::XGlobalHeader] {
            let pax = |value: usize| {
                let records = record("comment", &"c".repeat(value));
                let length = records.len();
                (length, [raw(kind, "x", &records), raw(EntryType::Regular, "a", b"")].concat())
            };
            let (length, fits) = pax((64 << 10) - 15);
            assert_eq!((length, names(&fits)), (64 << 10, vec!["a".to_owned()]));
            assert!(end_of(&pax((64 << 10) - 14).1).contains("65537 bytes; nbn reads up to 65536"));
            let name = [raw(kind, "x", &record("path", &"p".repeat(4097))), raw(EntryType::Regular, "a", b"")].concat();
            assert!(end_of(&name).contains("has 4097 bytes; nbn reads up to 4096"));
        }
    }

    #[test]
    fn one_member_has_one_header_of_each_kind() {
        let member = raw(EntryType::Regular, "a", b"");
        let pax = raw(EntryType::XHeader, "x", &record("path", "p"));
        let name = raw(EntryType::GNULongName, "L", b"n\0");
        let link = raw(EntryType::GNULongLink, "K", b"l\0");
        assert_eq!(names(&[&pax[..], &link, &name, &member, &pax, &member, &member].concat()), ["n", "p", "a"]);
        for (header, words) in [(&pax, "two PAX headers"), (&name, "two long names"), (&link, "two long link names")] {
            let twice = [&header[..], header, &member].concat();
            assert_eq!(end_of(&twice), format!("{words} describe the same member"));
            assert_eq!(end_of(header), "it ends after a header that describes a member");
        }
    }

    #[test]
    fn a_pax_size_counts_and_what_would_mislead_is_refused() {
        let pax = |records: &[u8], kind| raw(kind, "x", records);
        // The header says nothing, as that of a file beyond 8 GiB.
        let mut large = raw(EntryType::Regular, "a", b"");
        large.extend([7; 512]);
        let sized =
            [pax(&record("size", "512"), EntryType::XHeader), large, raw(EntryType::Regular, "b", b"")].concat();
        let (found, ended) = walk(&sized);
        assert_eq!(ended, Ok(()));
        assert_eq!(found, [("a".into(), Kind::File, vec![7; 512]), ("b".into(), Kind::File, vec![])]);
        let member = raw(EntryType::Regular, "a", b"");
        for (records, kind, words) in [
            (&record("size", "1e3")[..], EntryType::XHeader, "is not a number of bytes"),
            (&record("size", "18446744073709551615")[..], EntryType::XHeader, "claims 18446744073709551615 bytes"),
            (&record("size", "1")[..], EntryType::XGlobalHeader, "a global PAX header gives all members"),
            (&record("path", "x")[..], EntryType::XGlobalHeader, "a global PAX header gives all members"),
            (b"99 path=x\n", EntryType::XHeader, "a PAX header is damaged"),
            (b"path=x\n", EntryType::XHeader, "a PAX header is damaged"),
        ] {
            let end = end_of(&[pax(records, kind), member.clone()].concat());
            assert!(end.contains(words), "{end}");
        }
        // The last record of a key holds; a value may have a line end in it.
        let records = [record("path", "first"), record("comment", "a\nb"), record("path", "last")].concat();
        assert_eq!(names(&[pax(&records, EntryType::XHeader), member].concat()), ["last"]);
    }

    #[test]
    fn sparse_files_are_known_and_what_follows_them_is_found() {
        let mut old = Header::new_gnu();
        old.set_path("old.png").unwrap();
        old.set_entry_type(EntryType::GNUSparse);
        old.set_size(512);
        old.as_gnu_mut().unwrap().isextended = [1];
        old.set_cksum();
        let mut more = GnuExtSparseHeader::new();
        more.isextended = [1];
        let last = GnuExtSparseHeader::new();
        let records = [record("GNU.sparse.major", "1"), record("GNU.sparse.name", "new.png")].concat();
        let archive = [
            old.as_bytes(),
            &more.as_bytes()[..],
            last.as_bytes(),
            &[1; 512],
            &raw(EntryType::XHeader, "x", &records),
            &raw(EntryType::Regular, "GNUSparseFile.1/new.png", &[2; 600]),
            &raw(EntryType::Regular, "after.png", b"x"),
        ]
        .concat();
        let (found, ended) = walk(&archive);
        assert_eq!(ended, Ok(()));
        let kinds: Vec<_> = found.iter().map(|(name, kind, bytes)| (name.as_str(), *kind, bytes.len())).collect();
        assert_eq!(
            kinds,
            [("old.png", Kind::Sparse, 512), ("new.png", Kind::Sparse, 600), ("after.png", Kind::File, 1)]
        );
    }

    #[test]
    fn an_archive_that_is_cut_short_or_damaged_says_so() {
        let archive = [raw(EntryType::Regular, "a", &[1; 700]), raw(EntryType::Regular, "b", b"x")].concat();
        let whole = [(512 + 1024, 1), (2 * 512 + 1024 + 512, 2)];
        for end in 0..=archive.len() {
            let (found, ended) = walk(&archive[..end]);
            match whole.iter().find(|(length, _)| *length == end) {
                Some((_, members)) => assert_eq!((found.len(), ended), (*members, Ok(()))),
                None => assert!(ended.is_err(), "{end}"),
            }
        }
        assert_eq!(end_of(b""), "it is empty (0 bytes)");
        let mut damaged = archive.clone();
        damaged[1] ^= 1;
        assert_eq!(end_of(&damaged), "a header does not match its checksum");
        // The first empty block is the end, whatever follows.
        assert_eq!(names(&[&archive[..], &[0; 512], b"more"].concat()), ["a", "b"]);
    }
}
