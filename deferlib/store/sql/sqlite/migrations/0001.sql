-- The schema of deferlib 0.1.
--
-- A task's state is two times: `eta`, when it should run, and `due`, when anyone may next touch it. due = eta: waiting.
-- due > eta: leased until due. due is null: a tombstone, kept until `expires` because the task had a name.
-- The fixed-size columns that claims and settles write stand before the body, so that an update of a row with a large
-- body compares its overflow pages and rewrites none.

create table tasks (
    id integer primary key,
    nonce integer not null,
    queue text not null,
    name text,
    eta integer not null,
    due integer,
    claims integer not null default 0,
    attempts integer not null default 0,
    executions integer not null default 0,
    failures integer not null default 0,
    lost integer not null default 0,
    first_try integer,
    expires integer,
    status integer not null default 0,
    created integer not null,
    deadline integer not null,
    fail_fast integer not null,
    size integer not null,
    method text not null,
    url text not null,
    target text not null,
    headers text not null,
    namespace text not null,
    tag text not null,
    retry text not null,
    key_id blob not null,
    reason text not null default '',
    history text not null default '',
    body blob not null
) strict;

create index tasks_due on tasks (queue, due) where due is not null;
create unique index tasks_name on tasks (queue, name) where name is not null;
create index tasks_expires on tasks (expires) where expires is not null;

create table dead (
    id integer primary key,
    nonce integer not null,
    queue text not null,
    name text,
    eta integer not null,
    claims integer not null,
    attempts integer not null,
    executions integer not null,
    failures integer not null,
    lost integer not null,
    first_try integer,
    died integer not null,
    status integer not null,
    created integer not null,
    deadline integer not null,
    fail_fast integer not null,
    size integer not null,
    method text not null,
    url text not null,
    target text not null,
    headers text not null,
    namespace text not null,
    tag text not null,
    retry text not null,
    key_id blob not null,
    reason text not null,
    history text not null,
    body blob not null
) strict;

create index dead_queue on dead (queue, id);
create index dead_name on dead (queue, name) where name is not null;

create table queues (
    name text primary key,
    mode text not null,
    config text not null,
    source text not null,
    paused integer not null default 0,
    tat integer not null default 0,
    owner text not null default '',
    owned_until integer not null default 0
) strict, without rowid;

-- Counters kept by the verbs: counting a million rows takes 25 to 118 ms.
create table counts (
    queue text primary key,
    tasks integer not null default 0,
    dead integer not null default 0
) strict, without rowid;

create table minutes (
    queue text not null,
    minute integer not null,
    executed integer not null default 0,
    failed integer not null default 0,
    primary key (queue, minute)
) strict, without rowid;

create table meta (
    key text primary key,
    value text not null
) strict, without rowid;

insert into meta (key, value) values ('schema', '1'), ('min_reader', '1'), ('min_writer', '1');
