-- The tasks that fail rather than wait for a slot (X-AppEngine-FailFast), to be found among a million that wait.
--
-- `min_writer` stays: SQLite keeps the index up whoever writes.

create index tasks_fast on tasks (queue, due) where fail_fast = 1 and due is not null;

update meta set value = '2' where key = 'schema';
